"""The commands: one module for each, all under the entry point `scarlet`."""
