"""The command line: config files and overrides in, frozen settings out, one task run. Nothing below sees a flag."""
