"""Accepts the usage token alone. Without it, LiteLLM would look the key up in a database."""
from litellm.proxy._types import ProxyException, UserAPIKeyAuth

TOKEN = "sk-usage-token"


async def user_api_key_auth(request, api_key):
    if (api_key or "").removeprefix("Bearer ") != TOKEN:
        raise ProxyException(message="invalid key", type="auth_error", param="key", code=401)
    return UserAPIKeyAuth(api_key=TOKEN)
