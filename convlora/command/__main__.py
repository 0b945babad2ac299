"""``python -m convlora.command``: the ``convlora`` program if its script is not on the path."""

from . import main

main()
