"""The database is that of UNLOST_STORE: orders, invoices and events are in one."""

import os
from urllib.parse import unquote, urlsplit

_url = urlsplit(os.environ["UNLOST_STORE"])
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _url.path[1:],
        "HOST": _url.hostname,
        "PORT": _url.port,
        "USER": _url.username,
        "PASSWORD": unquote(_url.password or ""),
    }
}
INSTALLED_APPS = ["shop"]
ROOT_URLCONF = "shop.web"
SECRET_KEY = os.environ.get("SECRET_KEY", "for trying out only")
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "testserver"]
USE_TZ = True
