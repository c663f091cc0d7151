"""Write what moecc did to a model as one HTML file: `moecc report`."""
