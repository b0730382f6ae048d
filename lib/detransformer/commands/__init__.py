"""The commands: each module declares one or more, with typed options, and runs them."""
