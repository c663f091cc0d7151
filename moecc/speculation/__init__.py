"""Generate with drafts: see `moecc.speculate`."""
