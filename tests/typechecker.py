"""What the pytest hook checks annotations with: shapes by jaxtyping, the rest by beartype, where an int is a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
