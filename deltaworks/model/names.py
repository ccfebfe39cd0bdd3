"""The small vocabulary in which model authors name the layers of a block.

Names are hints only: each is believed where the shapes allow it. All patterns are matched against the last part of a
module's dotted name, in lower case.
"""

from __future__ import annotations

import re

import regex

QUERY = r"(?:to_|linear_|w|c_|p)?(?:q|query)(?:_(?:proj|projection|lin|linear|layer|[ab]_proj))?"
KEY = r"(?:to_|linear_|w|c_)?(?:k|key)(?:_(?:proj|projection|lin|linear|layer))?"
VALUE = r"(?:to_|linear_|w|c_)?(?:v|value)(?:_(?:proj|projection|lin|linear|layer))?"
KEY_VALUE = r"(?:to_|w|c_)?kv(?:_(?:proj|lin|linear|layer|[ab]_proj|a_proj_with_mqa))?"
FUSED_QKV = r"(?:to_|w|attn_|in_proj_|c_)?(?:qkv|c_attn|query_key_value)(?:_(?:proj|projection|lin|linear|layer))?"
OUTPUT = (
    r"(?:to_|w|c_|attn_|self_)?(?:o|out|output|proj|dense)(?:_(?:proj|projection|lin|linear|layer|dense))?|\w*o_proj"
)
POSITION_KEY = r"pos_(?:key|query|proj|q|k)(?:_proj)?|(?:linear|r|relative)_pos\w*|relative_key_proj"

GATE = r"(?:\w+_)?gate(?:_proj)?|w1|wi_0|linear_1|gating\w*"
UP = r"(?:\w+_)?up(?:_proj)?|w3|wi_1|v1|linear_v"
DOWN = r"(?:\w+_)?down(?:_proj)?|w2|wo|fc2|c_proj|fc_out|lin2|linear2|dense_4h_to_h|ffn_output|output|output_linear"
GATE_UP = r"gate_up(?:_proj)?|wi|fc1|w12|w1w3|gate_and_up|input_linear|w1|up_gate_proj"

POSITION = re.compile(r"pos(?!t)|wpe|rel_|relative", re.I)
RELATIVE = re.compile(r"rel_|relative", re.I)
TOKEN_TYPE = re.compile(r"token_type|segment", re.I)
HEAD = re.compile(r"head|classifier|score|lm_head|embed_out|cls|decoder|proj_out|qa_outputs|fc|output", re.I)
CROSS = re.compile(r"cross|enc(?:oder)?_?dec|encoder_attn|encoder_attention", re.I)
MEGATRON = re.compile(r"query_key_value", re.I)

HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv")
HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "d_kv", "dim_head")


def means(pattern: str, path: str) -> bool:
    """Whether the last part of the dotted name `path` is, as a whole, a name of this kind."""
    return re.fullmatch(pattern, path.rpartition(".")[2], re.IGNORECASE) is not None


PATIENCE = 0.2
"""Seconds a pattern may take on one name; sound ones take microseconds."""


def matches(pattern: str, path: str) -> bool:
    """Whether a regular expression, which may come from a file, fits a whole name.

    Raises:
        TimeoutError: for a pattern made to search for ever.
    """
    return regex.fullmatch(pattern, path, timeout=PATIENCE) is not None


def ends(pattern: str, path: str) -> bool:
    """Whether a regular expression fits the end of a dotted name, from any dot on; raises as `matches`."""
    return matches(rf"(?:.*\.)?(?:{pattern})", path)
