"""A published model in use: found, loaded, asked, and compared with others."""
