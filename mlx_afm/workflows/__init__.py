"""One whole job per file; read these first."""
