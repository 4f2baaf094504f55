"""One operation per file: contract, plain-torch reference, launcher that checks its inputs. Imports nothing of ours."""
