"""``python -m convlora.command``: the same where the script is on no path."""

from . import main

main()
