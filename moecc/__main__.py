"""Run the command line as `python -m moecc`."""

from moecc.cli import main

main()
