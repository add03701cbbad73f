"""What is read from programs written by hand: all ways of writing starts, ends, loops and fusions."""

import pytest

from tools.planning.program import Rates, read

# A product of 10 x 10 takes 2 seconds, a byte on a link 1; memory costs nothing.
RATES = Rates(bf16=1e3, fp8=2e3, memory=1e30, links={"a": 1.0, "b": 1.0})
ENDS = "\n}\n\n"


def module(body, *computations):
    """A program for devices of 2 x 2, `a` x `b`, whose lines may use %x, and PRODUCT for a product of it."""
    dot = "f32[10,10] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    lines = ["%x = f32[10,10] parameter(0)", *body]
    main = "\n".join(f"  {line}" for line in lines).replace("PRODUCT", dot)
    return (
        "HloModule jit_f, is_scheduled=true\n\n"
        + "".join(computation.replace("PRODUCT", dot) + ENDS for computation in computations)
        + "ENTRY %main (x: f32[10,10]) -> f32[10,10] {\n"
        + main
        + ENDS
    )


def inner(name, *lines):
    return f"%{name} (x: f32[10,10]) -> f32[10,10] {{\n" + "\n".join(
        f"  {line}" for line in ["%x = f32[10,10] parameter(0)", *lines]
    )


def read_of(text):
    return read(text, {"a": 2, "b": 2}, RATES)


def test_brackets_in_the_text_of_a_kernel_end_no_computation():
    kernel = '%k = f32[10,10] custom-call(%x), custom_call_target="tpu_custom_call", backend_config="f {'
    assert read_of(module([kernel + '\n}\n}, "a": 1}"', "ROOT %y = PRODUCT", "%z = PRODUCT"])).flops == 4000


GATHER = "f32[20,10] all-gather(%x), replica_groups={{0,2},{1,3}}, dimensions={0}"
PAIRS = {
    "its own opcode": (
        "%s = (f32[10,10], f32[20,10]) all-gather-start(%x), replica_groups=[2,2]<=[2,2]T(1,0), dimensions=",
        "%d = f32[20,10] all-gather-done(%s)",
    ),
    "a computation that runs beside": (
        "%s = ((f32[10,10]), f32[20,10], u32[]) async-start(%x), calls=%wrapped",
        "%d = f32[20,10] async-done(%s)",
    ),
    "a call that is renewed": (
        "%s = ((f32[10,10]), f32[20,10], u32[]) call-start(%x), to_apply=%wrapped",
        "%u = ((f32[10,10]), f32[20,10], u32[]) call-update(%s)",
        "%d = f32[20,10] call-done(%u)",
    ),
}


@pytest.mark.parametrize("written", PAIRS)
def test_every_way_of_writing_a_start_and_an_end_is_read(written):
    start, *between, end = PAIRS[written]
    text = module(
        [start, *between, "%p = PRODUCT", end, "ROOT %r = f32[10,10] copy(%p)"],
        inner("wrapped", f"ROOT %g = {GATHER}"),
    )
    ((kind, axes),) = (found := read_of(text)).by_axes
    one = found.collectives["all_gather"]
    assert (kind, axes) == ("all_gather", ("a",))
    assert (one.count, one.asynchronous, one.bytes, one.seconds, one.hidden) == (1, 1, 400, 400, 2)
    assert one.hidden_share == 2 / 400
    assert found.flops == 2000 and found.seconds == 2


@pytest.mark.parametrize(("groups", "hidden"), [("{{0,2},{1,3}}", 0), ("{{0,1},{2,3}}", 6)])
def test_a_loop_hides_what_its_own_exchanges_leave_the_links_for(groups, hidden):
    start, end = PAIRS["its own opcode"]
    turns = 'backend_config={"known_trip_count":{"n":"3"}}'
    loop = f"%l = f32[10,10] while(%x), condition=%cond, body=%turn, {turns}"
    inside = ["%p = PRODUCT", f"ROOT %q = f32[10,10] all-reduce(%p), replica_groups={groups}, to_apply=%add"]
    text = module(
        [start, loop, end, "ROOT %r = f32[10,10] copy(%l)"],
        inner("cond", "ROOT %c = pred[] constant(true)"),
        inner("turn", *inside),
    )
    found = read_of(text)
    assert found.collectives["all_gather"].hidden == hidden
    assert (found.collectives["all_reduce"].count, found.flops) == (3, 6000)


def test_a_synchronous_one_hides_nothing_and_ends_those_before_it():
    start, end = PAIRS["its own opcode"]
    body = [start, f"%g = {GATHER}", "%p = PRODUCT", end, "ROOT %r = f32[10,10] copy(%p)"]
    one = read_of(module(body)).collectives["all_gather"]
    assert (one.count, one.asynchronous, one.hidden) == (2, 1, 0)


def test_of_a_conditional_the_shortest_branch_hides_and_the_longest_counts():
    start, end = PAIRS["its own opcode"]
    branch = "%c = f32[10,10] conditional(%n, %x, %x, %x), branch_computations={%one, %none, %two}"
    body = ["%n = s32[] constant(1)", start, branch, end, "ROOT %r = f32[10,10] copy(%c)"]
    one = inner("one", "ROOT %p = PRODUCT")
    two = inner("two", "%p = PRODUCT", "ROOT %q = PRODUCT")
    found = read_of(module(body, one, inner("none", "ROOT %r = f32[10,10] copy(%x)"), two))
    assert found.flops == 4000 and found.seconds == 4
    assert found.collectives["all_gather"].hidden == pytest.approx(0, abs=1e-9)
    found = read_of(module(body, one, inner("none", "ROOT %p = PRODUCT"), two))
    assert found.collectives["all_gather"].hidden == 2


FUSED = {  # and the bytes that it moves, of operands of 400 and results
    "ROOT %y = f32[10,10] add(%x, %x)": 800,
    "ROOT %y = f32[100] bitcast(%x)": 800,
    "ROOT %y = f32[1,10] slice(%x), slice={[0:1], [0:10]}": 80,
    "%v = f32[100] bitcast(%x)\n  ROOT %y = f32[10] slice(%v), slice={[0:10]}": 80,
    "%p = f32[1,10] slice(%x), slice={[0:1], [0:10]}\n  ROOT %y = f32[10,10] add(%x, %x)": 800,
    "%u = f32[1,10] constant({...})\n  %n = s32[] constant(0)\n"
    "  ROOT %y = f32[10,10] dynamic-update-slice(%x, %u, %n, %n)": 40,
    "ROOT %y = f32[10,10]{1,0:T(8,128)S(1)} negate(%x)": 400,
}  # fmt: skip


@pytest.mark.parametrize("lines", FUSED)
def test_a_fusion_moves_what_it_reads_and_writes_of_the_chips_memory(lines):
    shape = lines.partition("ROOT %y = ")[2].partition(" ")[0]
    body = [f"ROOT %f = {shape} fusion(%x), kind=kLoop, calls=%fused"]
    assert read_of(module(body, inner("fused", lines))).bytes == FUSED[lines]


def test_a_slice_of_an_array_in_other_tiles_reads_no_more_than_the_slice():
    other = "%v = f32[10,10]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%tiles"
    fused = inner("fused", f"{other}\n  ROOT %y = f32[1,10] slice(%v), slice={{[0:1], [0:10]}}")
    body = ["ROOT %f = f32[1,10] fusion(%x), kind=kLoop, calls=%fused"]
    for root, moved in (("copy", 80), ("negate", 440)):
        tiles = inner("tiles", f"ROOT %c = f32[10,10]{{1,0:T(8,128)}} {root}(%x)")
        assert read_of(module(body, tiles, fused)).bytes == moved


def test_copies_to_the_chip_and_kept_there_move_their_bytes_once():
    body = [
        "%s = (f32[10,10]{1,0:S(1)}, f32[10,10]{1,0}, u32[]{:S(2)}) copy-start(%x)",
        "%d = f32[10,10]{1,0:S(1)} copy-done(%s)",
        "ROOT %y = f32[10,10]{1,0:S(1)} negate(%d)",
    ]
    found = read_of(module(body))
    assert found.bytes == 400
    assert found.seconds == 0  # it runs beside compute, and what is on the chip costs nothing


COUNTER = "%i = s32[] get-tuple-element(%t), index=0"
LIMIT = "%n = s32[] get-tuple-element(%t), index=1"
TUPLE = "%t = (s32[], s32[], f32[10,10]) parameter(0)"


@pytest.mark.parametrize(
    ("first", "step", "limit", "handed_on", "turns"),
    [
        ("constant(0)", "add(%i, %s)", "constant(7)", "%n", 7),
        ("constant(3)", "add(%s, %i)", "constant(8)", "%n", 5),
        ("constant(9)", "add(%i, %s)", "constant(8)", "%n", 0),
        ("get-tuple-element(%unknown), index=0", "add(%i, %s)", "constant(8)", "%n", None),
        ("constant(0)", "add(%i, %down)", "constant(8)", "%n", None),
        ("constant(0)", "multiply(%i, %s)", "constant(8)", "%n", None),
        ("constant(0)", "add(%i, %s)", "constant(8)", "%s", None),  # a limit that moves
    ],
)
def test_turns_follow_from_start_step_and_limit_or_are_asked_for(first, step, limit, handed_on, turns):
    body = [
        f"%first = s32[] {first}",
        f"%last = s32[] {limit}",
        "%all = (s32[], s32[], f32[10,10]) tuple(%first, %last, %x)",
        "%w = (s32[], s32[], f32[10,10]) while(%all), condition=%cond, body=%turn",
        "ROOT %r = f32[10,10] get-tuple-element(%w), index=2",
    ]
    if "unknown" in first:
        body.insert(0, "%unknown = (s32[]) parameter(1)")
    condition = ["ROOT %lt = pred[] compare(%i, %n), direction=LT"]
    turn = [
        "%s = s32[] constant(1)",
        "%down = s32[] constant(-1)",
        f"%more = s32[] {step}",
        "%p = PRODUCT",
        f"ROOT %o = (s32[], s32[], f32[10,10]) tuple(%more, {handed_on}, %p)",
    ]
    parts = [
        "\n".join([f"%{name} (t: (s32[], s32[], f32[10,10])) -> pred[] {{", *lines]).replace("\n", "\n  ")
        for name, lines in {
            "cond": [TUPLE, COUNTER, LIMIT, *condition],
            "turn": [TUPLE, COUNTER, LIMIT, "%x = f32[10,10] get-tuple-element(%t), index=2", *turn],
        }.items()
    ]
    found = read(module(body, *parts), {"a": 2, "b": 2}, RATES, lambda loop: 100)
    assert found.flops == 2000 * (100 if turns is None else turns)
    assert [loop.name for loop in found.loops] == (["w"] if turns is None else [])


def test_a_group_of_one_moves_nothing():
    body = ["ROOT %g = f32[10,10] all-gather(%x), replica_groups={{0},{1},{2},{3}}, dimensions={0}"]
    assert not read_of(module(body)).collectives


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("HloModule jit_f\n", "is_scheduled=true"),
        ("HloModule jit_f, is_scheduled=true\n", "no ENTRY"),
        (module([f"ROOT %g = {GATHER.replace('3', '4')}"]), "names device 4 but the mesh has 4"),
    ],
)
def test_what_is_no_program_of_this_mesh_is_refused_in_a_sentence(text, said):
    with pytest.raises(ValueError, match=said):
        read_of(text)


def hopper(function, operands, made):
    """A kernel of Mosaic GPU, of parameters with these shapes."""
    names = ", ".join(f"%p{n}" for n in range(len(operands)))
    parameters = [f"%p{n} = {shape} parameter({n + 1})" for n, shape in enumerate(operands)]
    name = f'metadata={{op_name="jit(step)/jit(attend)/jit({function})/anonymous/mpmd_map"}}'
    call = f'%k = {made} custom-call({names}), custom_call_target="mosaic_gpu_v2", {name}'
    return module([*parameters, call, "ROOT %y = f32[10,10] negate(%x)"])


Q, V, SUMS = "bf16[2,512,4,192]{3,2,1,0}", "bf16[2,512,4,128]{3,2,1,0}", "f32[2,4,512]{2,1,0}"
TABLE, PAIRS_SEEN = "s32[8]{0}", 2 * 4 * 512 * 513 // 2


@pytest.mark.parametrize(
    ("function", "operands", "made", "flops"),
    [
        ("matmul", ["bf16[256,64]", "bf16[4,64,32]", TABLE], "bf16[256,32]", 2 * 256 * 64 * 32),
        ("weight_gradient", ["bf16[256,64]", "bf16[256,32]", TABLE], "bf16[4,64,32]", 2 * 256 * 64 * 32),
        ("forward", [Q, Q, V, TABLE], f"({V}, {SUMS})", 2 * PAIRS_SEEN * 320),
        ("backward", [Q, V, SUMS, SUMS, Q, V, TABLE], f"({Q})", 2 * PAIRS_SEEN * 512),
        ("backward", [Q, V, Q, V, SUMS, SUMS, TABLE], f"({Q}, {V})", 2 * PAIRS_SEEN * 640),
        ("quantize", ["bf16[256,64]"], "(f8e4m3fn[256,64], f32[1,256])", 0),
    ],
)
def test_kernels_for_hopper_are_known_by_the_function_that_calls_them(function, operands, made, flops):
    found = read_of(hopper(function, operands, made))
    assert found.flops == flops and not found.unknown


def test_a_kernel_for_hopper_that_is_not_known_is_named():
    assert read_of(hopper("decode", [Q], V)).unknown == {"hopper_decode": 1.0}


def test_a_slice_that_is_copied_beside_compute_moves_twice_its_own_bytes():
    body = [
        "%i = s32[] constant(1)",
        "%s = ((f32[10,10], s32[]), f32[1,10], u32[]) fusion-start(%x, %i), kind=kLoop, calls=%fused",
        "%d = f32[1,10] fusion-done(%s)",
        "ROOT %y = f32[10] bitcast(%d)",
    ]
    found = read_of(module(body))
    assert found.bytes == 80 and found.seconds == 0
