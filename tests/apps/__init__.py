"""Small applications that tests run in real servers."""
