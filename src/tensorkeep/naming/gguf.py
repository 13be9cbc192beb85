NAME="gguf"
def recognise(n): return n.startswith("blk.")
