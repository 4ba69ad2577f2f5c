"""One RLOO update, and one whole step, beside TRL's."""
