"""What the comparisons in this folder's parent are made of: timing, peers, sections, tables."""
