

def make_images():
    for name, _, data in images():
        with open(os.path.join(DIRECTORY, name), "wb") as file:
            file.write(data)
