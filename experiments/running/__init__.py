"""What every command shares: how it runs, until when, and the records it keeps."""
