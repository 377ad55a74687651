"""`python -m anytimed.cli`."""

from anytimed.cli import main

main()
