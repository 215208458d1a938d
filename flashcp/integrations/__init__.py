"""FlashCP inside other people's training stacks: a folder or file each, which imports the library of its name."""
