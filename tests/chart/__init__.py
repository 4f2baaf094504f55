"""The chart, rendered by real helms, judged by the schemas of those who read it, and compared with the code."""
