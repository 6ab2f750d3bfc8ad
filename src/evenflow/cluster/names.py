"""Names of devices and links as people write them: case and spaces do not matter."""

import difflib
import re
from collections.abc import Sequence


def normal(name: str) -> str:
    """Return what two ways of writing one name have in common.

    >>> normal("NVIDIA A100-SXM4-80GB")
    'a100sxm480gb'
    """
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the end of an error message about an unknown name: which one may be meant, and which there are.

    >>> nearest("NVLnk 4", ["NVLink 4", "NVLink 3"])
    "; did you mean 'NVLink 4'? There are: NVLink 4, NVLink 3"
    """
    alike = difflib.get_close_matches(normal(name), [normal(each) for each in known], n=1)
    guess = next((f"; did you mean {each!r}?" for each in known if normal(each) in alike), ".")
    return f"{guess} There are: {', '.join(known)}"
