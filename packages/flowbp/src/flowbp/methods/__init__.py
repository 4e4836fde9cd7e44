"""The methods of the literature, each one constant in one file."""

from collections.abc import Mapping
from types import MappingProxyType

from flowbp.core.method import Method
from flowbp.methods.draft_k import DRAFT_K
from flowbp.methods.draft_lv import DRAFT_LV
from flowbp.methods.drtune import DRTUNE
from flowbp.methods.flowbp_bridge import FLOWBP_BRIDGE
from flowbp.methods.flowbp_lagrange import FLOWBP_LAGRANGE
from flowbp.methods.flowbp_sparse import FLOWBP_SPARSE
from flowbp.methods.full import FULL
from flowbp.methods.leapalign import LEAPALIGN
from flowbp.methods.refl import REFL
from imgen_common.errors import UserError, nearest

__all__ = ["METHODS", "Method", "get_method"]

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            REFL,
            DRAFT_K,
            DRAFT_LV,
            DRTUNE,
            LEAPALIGN,
            FLOWBP_SPARSE,
            FLOWBP_BRIDGE,
            FLOWBP_LAGRANGE,
            FULL,
        )
    }
)
"""Method by name, with the defaults of its paper."""


def get_method(name: str) -> Method:
    """The method called `name`.  Raises UserError with the nearest name and the list if there is none."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)}; allowed: {', '.join(METHODS)}")
    return METHODS[name]
