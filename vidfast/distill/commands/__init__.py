"""The commands of the command line that need this library, each a file.

A command's module has HELP, `add_arguments(parser)` and `run(arguments) -> exit code`. What is heavy, or
needs the [train] extra, it imports inside `run`.
"""
