"""Which names name a secret."""

import pytest

from rloo_fast.masking import is_secret_name

SECRET = """
api_key API_KEY apiKey APIKey api-key X-API-Key x-api-key OPENAI_API_KEY openai_key judge_key
token hub_token hub-token HF_TOKEN accessToken X-Auth-Token AWS_SESSION_TOKEN api_tokens
aws_secret_access_key client_secret clientSecret secret signing_key Ocp-Apim-Subscription-Key
password db_password DB_PWD passphrase credentials Authorization proxy-authorization auth basic_auth
PGPASSWORD db_pass consumer_key
cookie Set-Cookie jwt webhook GITHUB_PAT
"""
INNOCENT = """
pad_token eos_token bos_token mask_token stop_token stop_token_id eos_token_ids max_tokens tokens
max_new_tokens num_input_tokens_seen tokens_per_s tokenizer tokenizer_name_or_path token_level
token_level_kl TOKENIZERS_PARALLELISM skip_special_tokens completion_tokens num_tokens
key keys sort_key answer_key public_key monkey keyboard author authors author_name secretary
forward_pass first_pass num_passes bypass
PWD OLDPWD password_file secret_name AWS_ACCESS_KEY_ID path compass patience cookiecutter
"""


@pytest.mark.parametrize("name", SECRET.split())
def test_secret(name):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", INNOCENT.split())
def test_innocent(name):
    assert not is_secret_name(name)


def test_no_field_of_the_configuration_but_the_tokens_is_a_secret():
    from rloo_fast.config.fields import RLOOFields

    names = RLOOFields.__dataclass_fields__
    assert {name for name in names if is_secret_name(name)} == {"hub_token"}
