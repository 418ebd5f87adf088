"""The table of zero-shot protocols; a new one is a file of this folder and a line here."""

from collections.abc import Mapping

from sam_jax.evaluation.protocols.boxes import BoxProtocol
from sam_jax.evaluation.protocols.clicks import CLICK_PROTOCOLS
from sam_jax.evaluation.protocols.protocol import EvalProtocol

# By the names that configs use; rows of tables and curves of diagrams come in this order.
PROTOCOLS: Mapping[str, EvalProtocol] = {
    protocol.name: protocol
    for protocol in (
        *CLICK_PROTOCOLS,
        BoxProtocol(),
    )
}
