"""The settings by what they are about; `settings.Settings` is all of them."""
