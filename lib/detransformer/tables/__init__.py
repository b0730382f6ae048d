"""The papers' tables made of saved rows, and the style that all figures of the notebooks share."""
