"""FlashCP inside other people's training stacks: one folder or file each, which imports the library it is named after."""
