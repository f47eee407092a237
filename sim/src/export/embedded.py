# ---- images as bytes ---------------------------------------------------------------------------------------

def unpacked(text):
    return zlib.decompress(base64.b85decode("".join(text.split())))
