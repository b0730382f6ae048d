"""The commands: each module declares the options of one or two, typed, and says what they do."""
