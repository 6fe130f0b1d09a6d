"""Files that are no code: card templates, the quickstart, configurations of accelerate."""

from importlib import resources
from pathlib import Path


def find_shipped(name: str) -> Path:
    """
    Find a file that comes with the package: in the wheel inside it, in a checkout beside it.

    Args:
        name (`str`):
            Its path in the repository, as `"recipes/quickstart/in2core.yaml"`.

    Raises:
        FileNotFoundError: neither place has it.
    """
    package = Path(str(resources.files("hf_in2core"))).resolve()  # a checkout's may be reached through a link
    for path in (package / name, package.parent / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name} is neither in the installed package nor beside it. Install hf-in2core again.")
