"""For CPUs: products and attention by the fastest of what torch has on this processor."""
