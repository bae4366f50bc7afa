"""Adapters to other projects. Each module needs the package that it is named after, an extra of this one."""
