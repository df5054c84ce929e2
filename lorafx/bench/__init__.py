"""The bench: what an adapter costs, next to the frozen base's own cost and to other libraries."""
