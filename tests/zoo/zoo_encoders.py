"""Encoders of transformers: BERT and its kin."""

import torch
from zoo_configured import (
    DECODER,
    LENGTH,
    ROWS,
    VOCABULARY,
    family,
    generator,
    other,
    padding,
    text,
    texts_and_classes,
    tokens,
)

ENCODER = DECODER | {
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": 0.0,
    "attention_dropout": 0.0,
    "embedding_size": 12,
    "num_labels": 3,
    "num_key_value_heads": 2,
}

encoder = family(ENCODER, ties=True)


def texts_and_answers() -> dict[str, torch.Tensor]:
    batch = text()
    del batch["labels"]
    places = torch.randint(0, LENGTH // 2, (2, ROWS), generator=generator())
    return batch | {"start_positions": places[0], "end_positions": places[1] + 2}


def texts_and_choices() -> dict[str, torch.Tensor]:
    """Two choices for each row."""
    ids, mask = tokens(2 * ROWS).view(ROWS, 2, LENGTH), padding(2 * ROWS).view(ROWS, 2, LENGTH)
    labels = torch.randint(0, 2, (ROWS,), generator=generator())
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def texts_without_mask() -> dict[str, torch.Tensor]:
    batch = text()
    del batch["attention_mask"]
    return batch


def long_text(length: int) -> dict[str, torch.Tensor]:
    ids, mask = tokens(length=length), padding(length=length)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def boxes() -> torch.Tensor:
    corners = torch.randint(0, 16, (ROWS, LENGTH, 2), generator=generator())
    return torch.cat([corners, corners + 5], dim=-1)


ENCODERS = [
    encoder("bert", "BertForMaskedLM", exact=True),
    encoder("bert, classes", "BertForSequenceClassification", batch=texts_and_classes),
    encoder("bert, answers", "BertForQuestionAnswering", num_labels=2, batch=texts_and_answers),
    encoder("bert, choices", "BertForMultipleChoice", batch=texts_and_choices),
    encoder(
        "bert, tokens",
        "BertForTokenClassification",
        batch=lambda: text() | {"labels": text()["labels"].clamp(max=2)},
    ),
    encoder(
        "bert, several labels",
        "BertForSequenceClassification",
        problem_type="multi_label_classification",
        batch=lambda: texts_and_classes() | {"labels": tokens(length=3) % 2 * 1.0},
    ),
    encoder("roberta", "RobertaForMaskedLM", exact=True),
    encoder("roberta, classes", "RobertaForSequenceClassification", batch=texts_and_classes),
    encoder("xlm-roberta", "XLMRobertaForMaskedLM", exact=True),
    encoder("albert", "AlbertForMaskedLM", exact=True),
    encoder("electra", "ElectraForMaskedLM", exact=True),
    encoder(
        "electra, discriminator",
        "ElectraForPreTraining",
        batch=lambda: text() | {"labels": tokens() % 2},
    ),
    encoder(
        "deberta",
        "DebertaForMaskedLM",
        exact=True,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=8,
    ),
    encoder(
        "deberta-v2",
        "DebertaV2ForMaskedLM",
        exact=True,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=4,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        conv_kernel_size=3,
        position_biased_input=False,
    ),
    encoder("distilbert", "DistilBertForMaskedLM", exact=True, dim=16, hidden_dim=24, dropout=0.0),
    encoder("mpnet", "MPNetForMaskedLM", exact=True),
    encoder(
        "modernbert", "ModernBertForMaskedLM", exact=True, local_attention=4, global_attn_every_n_layers=2
    ),
    encoder("longformer", "LongformerForMaskedLM", exact=True, attention_window=4),
    encoder("big-bird", "BigBirdForMaskedLM", exact=True, attention_type="original_full"),
    encoder(
        "big-bird, sparse",
        "BigBirdForMaskedLM",
        exact=True,
        block_size=2,
        num_random_blocks=1,
        batch=lambda: long_text(24),
        max_position_embeddings=32,
    ),
    encoder("roformer", "RoFormerForMaskedLM", exact=True),
    encoder(
        "fnet",
        "FNetForMaskedLM",
        exact=True,
        batch=lambda: {k: v for k, v in text().items() if k != "attention_mask"},
    ),
    encoder(
        "squeezebert",
        "SqueezeBertForMaskedLM",
        embedding_size=16,
        q_groups=2,
        k_groups=2,
        v_groups=2,
        post_attention_groups=1,
        intermediate_groups=2,
        output_groups=2,
    ),
    encoder(
        "mobilebert",
        "MobileBertForMaskedLM",
        embedding_size=8,
        intra_bottleneck_size=8,
        true_hidden_size=8,
        num_feedforward_networks=2,
    ),
    other(
        "funnel",
        "FunnelForMaskedLM",
        text,
        exact=True,
        vocab_size=VOCABULARY,
        block_sizes=[2, 1],
        num_decoder_layers=1,
        d_model=16,
        n_head=2,
        d_head=8,
        d_inner=24,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    ),
    encoder("camembert", "CamembertForMaskedLM", exact=True),
    encoder("nomic", "NomicBertForMaskedLM"),
    encoder(
        "esm",
        "EsmForMaskedLM",
        mask_token_id=4,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=True,
    ),
    encoder(
        "layoutlm",
        "LayoutLMForMaskedLM",
        exact=True,
        max_2d_position_embeddings=32,
        batch=lambda: text() | {"bbox": boxes()},
    ),
    other(
        "xlnet",
        "XLNetLMHeadModel",
        text,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        d_model=16,
        n_layer=3,
        n_head=2,
        d_inner=24,
        dropout=0.0,
    ),
    encoder(
        "reformer",
        "ReformerForMaskedLM",
        is_decoder=False,
        attn_layers=["local", "lsh", "local"],
        axial_pos_shape=[4, 2],
        axial_pos_embds_dim=[8, 8],
        feed_forward_size=24,
        attention_head_size=8,
        local_attn_chunk_length=4,
        lsh_attn_chunk_length=4,
        num_buckets=2,
        num_hashes=1,
        hash_seed=1,
        lsh_attention_probs_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
    ),
    encoder(
        "canine",
        "CanineForSequenceClassification",
        num_hash_buckets=16,
        downsampling_rate=2,
        local_transformer_stride=4,
        upsampling_kernel_size=2,
        batch=texts_and_classes,
    ),
    encoder(
        "nystromformer",
        "NystromformerForMaskedLM",
        num_landmarks=4,
        segment_means_seq_len=8,
        conv_kernel_size=3,
        batch=texts_without_mask,
    ),
    encoder("yoso", "YosoForMaskedLM", use_expectation=True),
    encoder("convbert", "ConvBertForMaskedLM", conv_kernel_size=3, head_ratio=2, num_groups=1),
    encoder(
        "perceiver",
        "PerceiverForMaskedLM",
        exact=True,
        max_position_embeddings=LENGTH,
        num_latents=4,
        d_latents=16,
        d_model=16,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        qk_channels=16,
        v_channels=16,
    ),
]
