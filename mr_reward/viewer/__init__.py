"""Scored groups as an HTML page or a figure: `views` reads and prepares them, `page` draws them.

Nothing is exported: the way in is the command, `mr-reward inspect`.
"""
