"""The one exception that means "the user can fix this": the command line prints its text and no traceback."""


class UserError(ValueError):
    """Something in the configuration, the data or the models must change; the message says what and how."""


def wrong_byte(error: UnicodeDecodeError) -> str:
    """Where a file stops being UTF-8, and what to do."""
    return f"(byte 0x{error.object[error.start]:02x} at {error.start}): save it as UTF-8"
