"""The one exception that means "the user can fix this": the command line prints its text and no traceback."""


class UserError(ValueError):
    """Something in the configuration, the data or the models must change; the message says what and how."""
