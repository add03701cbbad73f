"""The block exchange of expert parallelism: block i of device j becomes block j of device i."""

from pallas_kernels.all_to_all.api import agree as agree
from pallas_kernels.all_to_all.api import exchange as exchange
from pallas_kernels.all_to_all.api import overlap as overlap
from pallas_kernels.all_to_all.reference import Rows as Rows
from pallas_kernels.all_to_all.reference import first as first
from pallas_kernels.all_to_all.tpu import done as done
from pallas_kernels.all_to_all.tpu import hold as hold
from pallas_kernels.all_to_all.tpu import serves as serves
from pallas_kernels.all_to_all.tpu import start as start
