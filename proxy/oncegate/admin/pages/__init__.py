"""The pages that an operator sees in a browser, with their templates and the files that they load."""
