"""The one error that the command line shows as one line."""


class UserError(Exception):
    """Something that the person at the keyboard can mend; its text is the whole message."""
