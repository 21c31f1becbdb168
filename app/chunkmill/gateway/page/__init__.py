"""The page of a gateway: templates, styles and a little JavaScript, which are files of this package."""
