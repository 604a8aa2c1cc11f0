"""The certificate: its contents, what it says, its files, its unions."""
