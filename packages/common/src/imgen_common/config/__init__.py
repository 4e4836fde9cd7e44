"""Configuration: frozen pydantic models, YAML files and `--set a.b=c`.

Precedence: class defaults < files, left to right < `--set`.  A file with `extends: other.yaml` lies over that file, its
path counted from its own.  Mappings merge key by key; setting `kind` to another value replaces its mapping, so that
nothing of the old kind is left, and over a default any `kind` begins anew with what that kind has by default; lists are
replaced whole (`--set rewards.0.weight=2` reaches into one).  YAML is read by the 1.2 core rules: `1e-4` is a number,
`no` and `on` are words.  A file may have 512 KiB, 64 values inside each other, and integers of 64 bits.
"""

from imgen_common.config.merge import load, read_layers, with_json_files
from imgen_common.config.reference import FieldRow, fields_table
from imgen_common.config.schema import Config, Presets, UserPath
from imgen_common.config.secrets import NO_SECRETS, ONE_ANSWER, KeyVariable, ServedModel
from imgen_common.config.yaml_files import dump_yaml, read_yaml, to_yaml

__all__ = [
    "NO_SECRETS",
    "ONE_ANSWER",
    "Config",
    "FieldRow",
    "KeyVariable",
    "Presets",
    "ServedModel",
    "UserPath",
    "dump_yaml",
    "fields_table",
    "load",
    "read_layers",
    "read_yaml",
    "to_yaml",
    "with_json_files",
]
