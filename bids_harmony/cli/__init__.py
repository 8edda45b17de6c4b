"""Command line: argv -> Config -> run one analysis level; exit codes."""
