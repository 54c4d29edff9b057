"""FlexAttention for sequences that do not fit on one GPU."""

from cpflex import masks_from as masks_from
from cpflex import trees as trees
from cpflex.attention import flex_attention, score_mod
from cpflex.masks import MaskMod, causal, document, full, prefix_lm, sliding_window
from cpflex.mods.trace import UnsupportedMod
from cpflex.paging.decode_plan import DecodePlan, make_decode_plan
from cpflex.paging.mask import mask_mod
from cpflex.paging.pages import OutOfPages, Pages
from cpflex.paging.pool import PagePool
from cpflex.paging.rows import by_head, by_sequence, by_token, everyone
from cpflex.paging.travel import keys, queries
from cpflex.planning.choose import auto
from cpflex.planning.cross import cached, cross
from cpflex.planning.make import make_plan
from cpflex.planning.nodes import topology_of
from cpflex.planning.packing import pack
from cpflex.planning.plan import Plan
from cpflex.ring.agreement import RankMismatch
from cpflex.ring.schedule import direct, even, gather, ring, ring_both
from cpflex.ring.two_level import relay
from cpflex.sharding.balance import balanced
from cpflex.sharding.layout import Layout, contiguous, striped, zigzag
from cpflex.sharding.packed import Packed
from cpflex.topology import Device, Heads, Topology
from cpflex.trees.tree import tree
from cpflex.version import __version__ as __version__

__all__ = [
    "DecodePlan",
    "Device",
    "Heads",
    "Layout",
    "MaskMod",
    "OutOfPages",
    "Packed",
    "PagePool",
    "Pages",
    "Plan",
    "RankMismatch",
    "Topology",
    "UnsupportedMod",
    "auto",
    "balanced",
    "by_head",
    "by_sequence",
    "by_token",
    "cached",
    "causal",
    "contiguous",
    "cross",
    "direct",
    "document",
    "even",
    "everyone",
    "flex_attention",
    "full",
    "gather",
    "keys",
    "make_decode_plan",
    "make_plan",
    "mask_mod",
    "pack",
    "prefix_lm",
    "queries",
    "relay",
    "ring",
    "ring_both",
    "score_mod",
    "sliding_window",
    "striped",
    "topology_of",
    "tree",
    "zigzag",
]
