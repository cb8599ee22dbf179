"""Who labels what, on which device and until when, and how a command ends."""
