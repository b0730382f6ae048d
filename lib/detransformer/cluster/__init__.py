"""The room of devices and links: real hosts or emulated ones, sessions on them, and what is measured there."""
