"""One small file per subcommand: parse, build, call."""
